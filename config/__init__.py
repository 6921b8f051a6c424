"""Recipes for train.py. A config can begin with another one: from config.modern import *"""
