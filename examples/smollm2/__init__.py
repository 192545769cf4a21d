"""SmolLM2-135M-Instruct, read from an installed package."""
