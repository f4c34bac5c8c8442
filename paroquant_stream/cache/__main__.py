"""`python -m paroquant_stream.cache ...`, which is `paroquant-stream cache ...`."""

from ..exits import end_with
from .command import main

end_with(main)
