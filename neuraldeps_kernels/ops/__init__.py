"""Public functions, one file a hot path: argument checks, fake, autograd, vmap and autocast rules, choice of kernel."""
