# For code whose compile time is a cost and whose speed is none: the command line and the tests. The
# optimizer takes more than half of the time to compile them, and the headers of JSON, formatting
# and test libraries most of the rest. The library that they call keeps its own flags.

# sluice_quick_compile(TARGET [HEADER ...]): -O1, and the headers precompiled.
function(sluice_quick_compile target)
  sluice_quick_flags(${target})
  target_precompile_headers(${target} PRIVATE ${ARGN})
endfunction()

# sluice_precompile(TARGET HEADER ...): the headers alone, for code whose speed counts.
function(sluice_precompile target)
  target_precompile_headers(${target} PRIVATE ${ARGN})
  # ccache sees through a precompiled header of g++ only with this.
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
endfunction()

function(sluice_quick_flags target)
  target_compile_options(${target} PRIVATE
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:Release>>:-O1>
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
endfunction()
