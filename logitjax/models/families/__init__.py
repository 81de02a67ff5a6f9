"""The families of decoders that come with the library, one value each."""
