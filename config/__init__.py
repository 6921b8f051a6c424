"""Config files for train.py. A config can start from another one: from config.modern import *"""
