"""study.yaml: read, checked once and frozen.

``spec`` the blocks of study.yaml · ``reading`` YAML to ``StudySpec`` · ``parameters`` what a study
can search · ``sampler_table`` the samplers' names · ``template`` writes a first study ·
``public_names`` names of models without local paths.
"""
