"""The only place that knows Hugging Face's and PEFT's names and formats."""
