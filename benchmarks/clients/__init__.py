"""Clients that other people wrote, run against the REST endpoint as their users run them.

Each is one command, needs no network once its packages are installed, prints what it found, and ends with exit status 1
if something did not pass. Without --url it starts a cluster of its own on free ports.
"""
