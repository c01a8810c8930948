"""What the network is trained with: targets, matching, criterion and regularizers. Knows no network."""
