"""Rebuild the miniature from nothing: ``python -m srpo_cli.miniature.build`` (see ``__main__``)."""
