"""Other people's clients, unmodified, against a real server; `make clients` runs them.

Each script names the versions that it was seen to pass with and has an environment of its own, since their wishes
do not agree with one another.
"""
