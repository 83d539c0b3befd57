"""Commands of ``qvlm-export`` that take a file of their own."""
