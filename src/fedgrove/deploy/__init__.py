"""The product between organisations: servers, sites, keys, audit; stands above the Flower
engine.
"""
