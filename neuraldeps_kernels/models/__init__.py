"""Networks defined in the package."""
