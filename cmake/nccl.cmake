# NCCL, for GPUs of several hosts. Its header is needed here; the library is opened at run time, so that
# a program built with NCCL runs on machines without it (src/transport/nccl_library.cc).
#
# Looked for: the CUDA toolkit, the distribution, and Python's package nvidia-nccl (nvidia/nccl/include in a
# site-packages folder: give it as -DSLUICE_NCCL_INCLUDE=...).
#
#   AUTO  where CUDA is built and a header of NCCL 2.28 or later is found
#   ON    the same, and an error without it
#   OFF   never
set(SLUICE_NCCL AUTO CACHE STRING "Build the NCCL transport: AUTO, ON or OFF")
set_property(CACHE SLUICE_NCCL PROPERTY STRINGS AUTO ON OFF)
set(SLUICE_HAS_NCCL OFF)
set(SLUICE_NCCL_WHY "SLUICE_NCCL is OFF")
if(SLUICE_NCCL AND NOT SLUICE_CUDA)
  set(SLUICE_NCCL_WHY "SLUICE_CUDA is OFF")
elseif(SLUICE_NCCL)
  find_path(SLUICE_NCCL_INCLUDE nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
  set(SLUICE_NCCL_WHY "there is no nccl.h (SLUICE_NCCL_INCLUDE)")
  if(SLUICE_NCCL_INCLUDE)
    file(STRINGS ${SLUICE_NCCL_INCLUDE}/nccl.h lines REGEX "^#define NCCL_(MAJOR|MINOR) +[0-9]+")
    string(REGEX REPLACE "[^0-9]+" "." version "${lines}")
    string(REGEX REPLACE "^\\.|\\.$" "" version "${version}")
    if(version VERSION_LESS 2.28)
      set(SLUICE_NCCL_WHY "${SLUICE_NCCL_INCLUDE}/nccl.h is of version ${version}, at least 2.28 is needed")
    else()
      set(SLUICE_HAS_NCCL ON)
      set(SLUICE_NCCL_WHY "header of ${version} in ${SLUICE_NCCL_INCLUDE}")
    endif()
  endif()
endif()
if(NOT SLUICE_HAS_NCCL AND SLUICE_NCCL STREQUAL "ON")
  message(FATAL_ERROR "SLUICE_NCCL=ON: ${SLUICE_NCCL_WHY}")
endif()
message(STATUS "Sluice: NCCL ${SLUICE_HAS_NCCL} (${SLUICE_NCCL_WHY})")
