"""The configuration file of a node: its schema, how it is read, written, explained and compared.

:mod:`.schema` holds every setting: those of :mod:`.run` and of :mod:`.node`, made of :mod:`.kinds` of values, under the
:mod:`.rules`. :mod:`.load` reads a TOML file, :mod:`.template` writes one, :mod:`.spec` gives the run id and what
differs between two runs, :mod:`.contact` is the address of a member, and :mod:`.reference` says what each setting
takes. Nothing is imported here, so that each costs only what it needs.
"""
