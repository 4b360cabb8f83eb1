"""Sources in other programs' formats: each weight is decoded to floats slice by slice, and then quantized or kept."""
