"""Sluice inside other libraries, one module for each; importing one registers it there."""
