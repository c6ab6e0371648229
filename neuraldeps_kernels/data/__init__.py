"""Data: the shipped ImageNet logit covariance, logits files, digits, pictures and networks inside installed packages."""
