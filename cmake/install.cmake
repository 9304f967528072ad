# `cmake --install`: library, headers, command line, and a package for find_package(sluice).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/sluice)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/sluice DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS sluice sluice_lab EXPORT sluice_targets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TARGET sluice_cuda_kernels)
  # Its headers are internal.
  set_property(TARGET sluice_cuda_kernels PROPERTY INTERFACE_INCLUDE_DIRECTORIES
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/src>)
  install(TARGETS sluice_cuda_kernels EXPORT sluice_targets)
endif()
if(TARGET sluice_cli)
  install(TARGETS sluice_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT cli)
endif()

# Debian's Highway has a CMake package; where it was used, users need it too.
get_target_property(links sluice LINK_LIBRARIES)
string(FIND "${links}" "hwy::hwy" hwy_at)
if(hwy_at EQUAL -1)
  set(sluice_needs_hwy OFF)
else()
  set(sluice_needs_hwy ON)
endif()
install(EXPORT sluice_targets NAMESPACE sluice:: DESTINATION ${package_dir})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/sluiceConfig.cmake.in
  ${PROJECT_BINARY_DIR}/sluiceConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/sluiceConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/sluiceConfig.cmake
  ${PROJECT_BINARY_DIR}/sluiceConfigVersion.cmake DESTINATION ${package_dir})
