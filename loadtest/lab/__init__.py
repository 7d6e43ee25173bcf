"""Experiments, each of which backs a page of docs: it prints the page's figures. Nothing imports them."""
