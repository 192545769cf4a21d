"""A small residual CNN trained on Fashion-MNIST."""
