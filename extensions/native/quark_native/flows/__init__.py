"""Ways through a model: today eager, which quantizes its layers where they stand."""
