# cmake --install: headers, the library with its SONAME, and what find_package(edgedistill) reads.
include(CMakePackageConfigHelpers)

set(EDGEDISTILL_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/edgedistill)

install(TARGETS edgedistill EXPORT edgedistillTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
)
install(DIRECTORY include/edgedistill DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT edgedistillTargets NAMESPACE edgedistill:: DESTINATION ${EDGEDISTILL_CMAKE_DIR})

configure_package_config_file(cmake/edgedistillConfig.cmake.in ${PROJECT_BINARY_DIR}/edgedistillConfig.cmake
  INSTALL_DESTINATION ${EDGEDISTILL_CMAKE_DIR})
# Before 1.0 a new minor version may break what was built with the last.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/edgedistillConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/edgedistillConfig.cmake
  ${PROJECT_BINARY_DIR}/edgedistillConfigVersion.cmake
  DESTINATION ${EDGEDISTILL_CMAKE_DIR}
)
