"""From the user's photographs to a frozen manifest: sources, checks, splits, folds and augmentation."""
