"""A model's first layers that know what to forget: trained, subtracted while decoding, merged."""
