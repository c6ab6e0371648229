"""The functions of `ops` in plain PyTorch: the oracle of every test, and the fallback where no kernel serves."""
