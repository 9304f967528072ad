# Objects come from ccache where it is installed: a fresh clone, another preset of the same flags and
# a second build compile nothing that this machine compiled before, nvcc's objects included.
#
# CCACHE_BASEDIR makes paths below the source tree relative and CCACHE_NOHASHDIR leaves the working
# directory out, so that the place of a clone is no part of what is looked up. The price: debug
# information names files relative to the directory of the build. Precompiled headers need the two
# sloppiness flags; nothing in this tree prints __DATE__ or __TIME__.
#
# -DSLUICE_CCACHE=OFF compiles everything anew. A launcher that the caller chose stays.
option(SLUICE_CCACHE "Compile through ccache where it is installed" ${PROJECT_IS_TOP_LEVEL})
if(SLUICE_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(SLUICE_CCACHE_PROGRAM ccache)
  if(SLUICE_CCACHE_PROGRAM)
    set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}
      CCACHE_NOHASHDIR=1 CCACHE_SLOPPINESS=pch_defines,time_macros ${SLUICE_CCACHE_PROGRAM})
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
    message(STATUS "Sluice: compiling through ${SLUICE_CCACHE_PROGRAM}")
  endif()
endif()
