"""What the covariance of images says of the noise levels: what must be seen at which."""
