// edgedistill: classify images on a CPU with the same answers as in Python.
//
//     edgedistill::Classifier classifier("openvino/");
//     edgedistill::Prediction answer = classifier.classify_file("photo.jpg");
//     std::cout << answer.label << ' ' << answer.probability << '\n';
#pragma once

#include <edgedistill/classifier.hpp>
#include <edgedistill/engine.hpp>
#include <edgedistill/error.hpp>
#include <edgedistill/image.hpp>
#include <edgedistill/options.hpp>
#include <edgedistill/prediction.hpp>
#include <edgedistill/version.hpp>
