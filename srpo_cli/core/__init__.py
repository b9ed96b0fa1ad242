"""The mathematics of SRPO and Direct-Align: tensors in, tensors out, to be read next to arXiv:2509.06942."""
