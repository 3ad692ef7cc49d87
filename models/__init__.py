"""Small networks that ship with the compiler: a trained decoder and random-weight builders.

Nothing is imported here, so ``import qcompiler.models`` costs nothing; import what is needed by name:

* :mod:`qcompiler.models.pystdlib` -- a trained language model of Python source, with its held-out text;
* :mod:`qcompiler.models.builders` -- random-weight networks for tests and examples;
* :mod:`qcompiler.models.decoder` -- the decoder architecture both of them use.
"""
