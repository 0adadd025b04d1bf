# Installs the library into a folder, moves that folder, builds the consumer against it and classifies a picture.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

set(kind_option ON)
if(KIND STREQUAL "static")
  set(kind_option OFF)
endif()
set(build ${LIBRARY})
if((SHARED AND KIND STREQUAL "static") OR (NOT SHARED AND KIND STREQUAL "shared"))
  set(build ${WORK}/library)
  run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${SOURCE} -B ${build} -DOpenVINO_DIR=${OpenVINO_DIR}
    -DBUILD_SHARED_LIBS=${kind_option} -DCMAKE_BUILD_TYPE=Release -DEDGEDISTILL_TESTS=OFF -DEDGEDISTILL_PROGRAMS=OFF)
  run(${CMAKE_COMMAND} --build ${build} -j 2)
endif()

file(REMOVE_RECURSE ${WORK}/first-place ${WORK}/prefix ${WORK}/build)
run(${CMAKE_COMMAND} --install ${build} --prefix ${WORK}/first-place)
file(RENAME ${WORK}/first-place ${WORK}/prefix)
run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${SOURCE}/tests/consumer -B ${WORK}/build
  -DCMAKE_PREFIX_PATH=${WORK}/prefix -DCMAKE_BUILD_TYPE=Release)
run(${CMAKE_COMMAND} --build ${WORK}/build)

execute_process(COMMAND ${WORK}/build/consumer ${MODELS}/single ${MODELS}/photos/red.jpg
  OUTPUT_VARIABLE answer COMMAND_ERROR_IS_FATAL ANY)
if(NOT answer MATCHES "^red 0\\.")
  message(FATAL_ERROR "the consumer said '${answer}', expected 'red' and its probability")
endif()
execute_process(COMMAND ${WORK}/build/consumer ${MODELS}/single ${MODELS}/nothing.jpg
  RESULT_VARIABLE code ERROR_VARIABLE reason)
if(NOT code EQUAL 1 OR NOT reason MATCHES "nothing.jpg")
  message(FATAL_ERROR "a file that is not there: exit code ${code}, '${reason}'")
endif()
message(STATUS "${KIND}: ${answer}")
