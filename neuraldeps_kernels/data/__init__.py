"""Data: the shipped ImageNet logit covariance, logits files, pictures and networks inside installed packages."""
