# For a wheel that needs nothing of the machine it is installed on (scripts/build_wheel.sh): links the
# static libraries in SLUICE_STATIC_DEPENDENCIES in place of the system's shared ones. They must be of
# the version of the system's headers, which are used as before, so that objects do not differ.
set(SLUICE_STATIC_DEPENDENCIES "" CACHE PATH
  "Folder of libfmt.a and libhwy.a to link instead of the shared libraries; empty: link those")

# $1: an imported target, $2: the name of its library in that folder
function(sluice_link_statically target file)
  if(NOT SLUICE_STATIC_DEPENDENCIES)
    return()
  endif()
  set(path ${SLUICE_STATIC_DEPENDENCIES}/${file})
  if(NOT EXISTS ${path})
    message(FATAL_ERROR "SLUICE_STATIC_DEPENDENCIES: there is no ${path}")
  endif()
  get_target_property(configurations ${target} IMPORTED_CONFIGURATIONS)
  foreach(configuration IN LISTS configurations)
    set_target_properties(${target} PROPERTIES IMPORTED_LOCATION_${configuration} ${path})
  endforeach()
  set_target_properties(${target} PROPERTIES IMPORTED_LOCATION ${path})
endfunction()
