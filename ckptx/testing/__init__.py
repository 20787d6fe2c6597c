"""The conformance kit: what a plugin must do, as test classes to inherit.

A package that offers a loader, a saver or a family tests itself with it; ckptx does so too.

    from ckptx.testing.contracts import Checkpoint, LoaderTests, SaverTests

    class TestNpz(LoaderTests, SaverTests):
        loader, saver = NpzLoader(), NpzSaver()

        def write(self, directory, model):
            ...                      # by a road of its own, not by the saver
            return Checkpoint(directory, model.canonical())

`tagged` makes weights that tell where they belong, `models` tiny models of them, `contracts` the
classes, `conversion` runs plugins in this process, `faults` breaks files, `strategies` are for
Hypothesis. pytest and Hypothesis are imported by the modules that need them, torch by none.
"""
