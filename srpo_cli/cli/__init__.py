"""The ``srpo`` command: thin commands around the recipes, which import nothing heavy until needed."""
