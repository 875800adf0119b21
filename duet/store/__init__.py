"""The cached teacher: asked once (`duet cache`), read in every training after that.

build        asks the teacher and fills a store; or fills it from columns that were made elsewhere
read         the format on disk, and how it is read
write        how it is written, so that a killed process loses little and damages nothing
columns      a store as columns of a `datasets.Dataset`, and back
served       what a server (vLLM, OpenAI's API) says, as such columns
provenance   what a store must agree in with the run that reads it
"""
