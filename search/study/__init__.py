"""What is wanted: study.yaml, read, checked once and frozen.

``spec`` the blocks of study.yaml · ``reading`` YAML to ``StudySpec`` · ``parameters`` what a study
can search · ``sampler_table`` the samplers' names · ``template`` writes a study to begin with.
"""
