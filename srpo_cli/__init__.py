"""srpo: align text-to-image models with a human preference by SRPO on Direct-Align (arXiv:2509.06942)."""

__version__ = "0.1.0"
