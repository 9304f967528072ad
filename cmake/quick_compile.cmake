# What makes a build quick. Where a second of compiling goes (g++ 12, one file of the runtime): a third
# to headers of the standard library, a tenth to the compiler's garbage collector, half to the optimizer.
#
#   every file       g++ collects garbage less often (sluice_flags)
#   most files       -O2, which is the default of this tree, and common headers precompiled
#   hot files        -O3: sluice_hot_sources()
#   cold files       -O1: sluice_cold_sources()
#   lab, CLI, tests  -O1: sluice_quick_flags(), sluice_quick_compile(); the library that they call keeps its
#                    own flags, and so do hot files of the laboratory
#
# Precompiled headers are a list of others' headers, never of this tree's, so that a change of ours
# recompiles what includes it and no more. A file still includes all that it uses: CUDA files and
# builds with -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON have no such list, and tools/check_includes.py
# looks for what a file uses without including it.
set(SLUICE_COMMON_HEADERS <fmt/core.h> <algorithm> <array> <atomic> <chrono> <cmath> <cstring> <functional> <map>
  <memory> <mutex> <numeric> <optional> <span> <string> <string_view> <thread> <unordered_map> <utility> <vector>)

# sluice_precompile(TARGET [HEADER ...]): the common headers and these, precompiled.
function(sluice_precompile target)
  target_precompile_headers(${target} PRIVATE ${SLUICE_COMMON_HEADERS} ${ARGN})
  # ccache sees through a precompiled header of g++ only with this.
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
endfunction()

# sluice_quick_json(TARGET): its files see a copy of <nlohmann/json.hpp> without the library's two literals. The body
# of ""_json calls the parser, and g++ compiles what an inline function calls whether or not that function is used:
# a parser in every file, 0.9 of the 1.3 s that an empty one takes beside the precompiled headers. Nothing here uses
# the literals. A version of the library whose text is another is used as it is.
function(sluice_quick_json target)
  get_target_property(folders nlohmann_json::nlohmann_json INTERFACE_INCLUDE_DIRECTORIES)
  find_file(SLUICE_JSON_HEADER nlohmann/json.hpp PATHS ${folders} NO_CACHE)
  set(copy ${PROJECT_BINARY_DIR}/quick_headers)
  if(SLUICE_JSON_HEADER AND NOT EXISTS ${copy}/nlohmann/json.hpp)
    file(READ ${SLUICE_JSON_HEADER} text)
    string(FIND "${text}" "inline namespace literals" begin)
    string(FIND "${text}" "NLOHMANN_JSON_NAMESPACE_END" end REVERSE)
    if(begin LESS 0 OR end LESS begin)
      message(STATUS "JSON: the header's literals were not found, and every file compiles them")
      return()
    endif()
    string(SUBSTRING "${text}" 0 ${begin} head)
    string(SUBSTRING "${text}" ${end} -1 tail)
    string(REGEX REPLACE "using nlohmann::literals::[^;]*;" "" tail "${tail}")
    file(WRITE ${copy}/nlohmann/json.hpp "${head}${tail}")
  endif()
  target_include_directories(${target} SYSTEM BEFORE PRIVATE ${copy})
endfunction()

# sluice_hot_sources(TARGET FILE ...): their time is that of a layer, a conversion or a check. Flags of the
# caller's own, for example -O1 while developing, are left alone.
function(sluice_hot_sources target)
  if(SLUICE_DEFAULT_FLAGS)
    set_property(SOURCE ${ARGN} TARGET_DIRECTORY ${target} APPEND PROPERTY COMPILE_OPTIONS
      $<$<CONFIG:Release>:-O3>)
  endif()
endfunction()

# sluice_cold_sources(TARGET FILE ...): they run once in a command, over descriptions and never over weights.
function(sluice_cold_sources target)
  set_property(SOURCE ${ARGN} TARGET_DIRECTORY ${target} APPEND PROPERTY COMPILE_OPTIONS
    $<$<CONFIG:Release>:-O1>)
endfunction()

# sluice_cold_rest(TARGET): what is not hot is cold. Not sluice_quick_flags(), which lowers the precompiled header's own
# level too: g++ 12 crashes on a file of -O3 behind a header of -O1, while one of -O2 serves both.
function(sluice_cold_rest target)
  get_target_property(files ${target} SOURCES)
  foreach(file ${files})
    get_source_file_property(options ${file} TARGET_DIRECTORY ${target} COMPILE_OPTIONS)
    if(NOT options)
      sluice_cold_sources(${target} ${file})
    endif()
  endforeach()
endfunction()

# sluice_quick_compile(TARGET [HEADER ...]): -O1, and the headers precompiled.
function(sluice_quick_compile target)
  sluice_quick_flags(${target})
  sluice_precompile(${target} ${ARGN})
endfunction()

function(sluice_quick_flags target)
  target_compile_options(${target} PRIVATE
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:Release>>:-O1>
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
endfunction()

# sluice_compile_with(TARGET LIBRARY FILE ...): these files see the library's headers. The others are compiled by
# the same command with the library and without it, so that one build's objects serve the next one through ccache:
# the wheel, the demo and the tests differ in CUDA and MPI alone.
function(sluice_compile_with target library)
  foreach(property INCLUDE_DIRECTORIES COMPILE_DEFINITIONS COMPILE_OPTIONS)
    get_target_property(value ${library} INTERFACE_${property})
    if(value)
      set_property(SOURCE ${ARGN} TARGET_DIRECTORY ${target} APPEND PROPERTY ${property} ${value})
    endif()
  endforeach()
endfunction()
