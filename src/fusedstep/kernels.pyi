from .reference import *
