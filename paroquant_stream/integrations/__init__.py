"""The loader of this package in the place of other packages' loaders."""
