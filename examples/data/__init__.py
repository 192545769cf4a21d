"""Public-domain text for the language-model examples."""
