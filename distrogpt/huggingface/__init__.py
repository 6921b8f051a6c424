"""Models as folders in the format of Hugging Face's transformers."""
