"""Data: the shipped ImageNet logit covariance, logits files, digits, pictures and networks of installed packages."""
