"""Small helpers that several parts of the package share. They know nothing of networks, losses, or datasets."""
