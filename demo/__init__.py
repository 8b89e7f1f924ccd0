"""The demo: drawn clips and their tracker, the end-to-end runs, and the recipes of the shipped assets."""
