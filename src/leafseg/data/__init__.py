"""From files to training samples: images, manifests, transforms, data sets."""
