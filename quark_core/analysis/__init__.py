"""What is done with several quantized models; written against the interfaces alone."""
