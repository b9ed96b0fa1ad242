"""The human study: blind pictures, raters, grades, and what these say."""
