"""Ray, and nothing but Ray."""

from .address import present_token

present_token()  # before a module of this package imports Ray, which looks at the mode only then
