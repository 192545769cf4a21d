"""Showing results: tables for the terminal, one HTML file for the browser.

Reads what runs wrote, never the models themselves.
"""
