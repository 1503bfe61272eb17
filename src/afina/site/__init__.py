"""Where to train: site file, image and its signature, GPUs."""
